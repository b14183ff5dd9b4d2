# make demo   set up, then run the main job on real data
# make test   set up, then run all tests
# Set-up (a virtual environment, pinned dependencies, the native build) is done again only when one
# of its inputs changed.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# (Triton's kernels run on CPU tensors, in an interpreter that must be asked for before the import.)
NATIVE_SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name 'CMakeLists.txt')
CXX_FOUND := $(shell command -v $${CXX:-c++} || command -v g++ || command -v clang++)
export PATH := $(abspath $(VENV))/bin:$(PATH)

.PHONY: demo test python-tests interpreter-tests ctest wheel-test lint format bench docs gpu-check gpu-wheels doctor clean

demo: $(VENV)/built
	$(PY) -P -m pyreg demo

test: $(VENV)/built ctest
	$(MAKE) --jobs=2 --output-sync=line python-tests interpreter-tests

python-tests: $(VENV)/built
	$(PY) -P -m pytest --import-mode=importlib -m "not wheel"

interpreter-tests: $(VENV)/built
	TRITON_INTERPRET=1 $(PY) -P -m pytest --import-mode=importlib -p no:cacheprovider \
		tests/test_sweeps.py tests/test_triton_kernels.py tests/test_triton_steps.py tests/test_triton_precision.py \
		tests/test_triton_optim.py tests/test_triton_backend.py

# The C++ tests of csrc by itself.
ctest: $(VENV)/installed
ifneq ($(CXX_FOUND),)
	cmake -S csrc -B build/csrc -G Ninja -DPYREG_BINDINGS=OFF -DPYREG_CUDA=OFF \
		-DPYREG_WARNINGS_AS_ERRORS=ON
	cmake --build build/csrc
	ctest --test-dir build/csrc --output-on-failure
else
	@echo "No C++ compiler: csrc is not built, and the tests run on the torch backend."
endif

# Builds the wheel in isolation, leaves the tree and uses it.
wheel-test: $(VENV)/built
	$(PY) -P -m pytest --import-mode=importlib -m wheel

lint: $(VENV)/installed
	ruff check .
	ruff format --check .
	clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu')

format: $(VENV)/installed
	ruff check --fix .
	ruff format .
	clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu')

# Every record in bench/results/ on this machine, and the documents' figures from them.
bench: $(VENV)/built
	$(PY) -m bench all

# The documents as a site in build/site, with their pictures drawn anew.
docs: $(VENV)/built
	$(PY) -P docs/figures.py
	$(PY) -P -m mkdocs build --strict

# All that needs a GPU, in one command without a network: `make gpu-check OUT=folder WHEELS=folder`.
# DRY_RUN=1 walks its steps on a machine without one; ONLY="tests figures" takes some of them.
OUT ?= gpu-results
ifdef DRY_RUN
gpu-check: $(VENV)/built
	$(PY) -m bench.gpu $(OUT) --dry-run $(if $(WHEELS),--wheels $(WHEELS))
else
gpu-check:
	$(PYTHON) -m bench.gpu $(OUT) $(if $(WHEELS),--wheels $(WHEELS)) $(if $(COMMIT),--commit $(COMMIT)) \
		$(if $(ONLY),--only $(ONLY))
endif

# What a GPU machine without a network may lack, for its Python: carry the folder there.
GPU_PYTHON := 3.12
gpu-wheels: $(VENV)/installed
	$(PY) -m pip download --only-binary=:all: --python-version $(GPU_PYTHON) --no-deps -d wheels \
		--platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --platform any \
		pytest==9.0.1 pytest-xdist==3.8.0 execnet pluggy iniconfig packaging pygments \
		hypothesis==6.155.2 sortedcontainers \
		pybind11==3.0.1 setuptools==80.9.0 \
		matplotlib==3.10.7 contourpy cycler fonttools kiwisolver pillow pyparsing python-dateutil six

doctor: $(VENV)/built
	$(PY) -P -m pyreg doctor

clean:
	rm -rf $(VENV) build pyreg/_native*.so pyreg/_cuda*.so *.egg-info

$(VENV)/installed: requirements-dev.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

# (An old module must not pass for one that was not built. With a compiler, a failure is an error.)
$(VENV)/built: $(VENV)/installed pyproject.toml setup.py $(NATIVE_SOURCES)
	rm -f pyreg/_native*.so pyreg/_cuda*.so
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	$(if $(CXX_FOUND),$(if $(filter none,$(PYREG_BUILD)),,$(PY) -P -c "import pyreg._native"))
	touch $@

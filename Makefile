# make demo   set up, then run the main job on real data
# make test   set up, then run all tests
# Set-up (a virtual environment, pinned dependencies, the native build) is done again only when one
# of its inputs changed.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# (Triton's kernels run on CPU tensors, in an interpreter that must be asked for before the import.)
NATIVE_SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name 'CMakeLists.txt')
CXX_FOUND := $(shell command -v $${CXX:-c++} || command -v g++ || command -v clang++)
export PATH := $(abspath $(VENV))/bin:$(PATH)

.PHONY: demo test ctest wheel-test lint format bench doctor clean

demo: $(VENV)/built
	$(PY) -P -m pyreg demo

test: $(VENV)/built ctest
	$(PY) -P -m pytest --import-mode=importlib -m "not wheel"
	TRITON_INTERPRET=1 $(PY) -P -m pytest --import-mode=importlib \
		tests/test_triton_kernels.py tests/test_triton_backend.py

# The C++ tests of csrc by itself.
ctest: $(VENV)/installed
ifneq ($(CXX_FOUND),)
	cmake -S csrc -B build/csrc -G Ninja -DPYREG_BINDINGS=OFF -DPYREG_WARNINGS_AS_ERRORS=ON
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
	clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp')

format: $(VENV)/installed
	ruff check --fix .
	ruff format .
	clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp')

# Every figure in the README, on this machine; takes some minutes.
bench: $(VENV)/built
	$(PY) -m bench

doctor: $(VENV)/built
	$(PY) -P -m pyreg doctor

clean:
	rm -rf $(VENV) build pyreg/_native*.so *.egg-info

$(VENV)/installed: requirements-dev.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

$(VENV)/built: $(VENV)/installed pyproject.toml setup.py $(NATIVE_SOURCES)
	$(if $(CXX_FOUND),PYREG_BUILD=$${PYREG_BUILD:-cpu}) $(PY) -m pip install --quiet \
		--disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

"""DTensors: what four processes find is what one finds of the whole tensors."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing

pytest.importorskip("torch.distributed.fsdp", reason="torch without torch.distributed")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch without gloo", allow_module_level=True)

import ranks


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """{scenario.rank: what it raised, or nothing}, of one run of them all."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.start_processes(
        ranks.run, (folder,), nprocs=ranks.RANKS, start_method="spawn"
    )
    return {path.name: path.read_text() for path in folder.glob("*.[0-9]")}


@pytest.mark.parametrize("rank", range(ranks.RANKS))
@pytest.mark.parametrize("name", ranks.SCENARIOS)
def test_as_one_process_has_it(native, said, name, rank):
    if raised := said[f"{name}.{rank}"]:
        pytest.fail(raised, pytrace=False)

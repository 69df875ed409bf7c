"""Wrapped by DistributedDataParallel and FSDP2, before and after: losses and gradients of two processes are those of one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("this torch was built without torch.distributed", allow_module_level=True)

from tests.torch import distributed_program as program

BLOCK = ["attention", "rms_norm"]
WHOLE = sorted([*BLOCK, *BLOCK, "linear_cross_entropy"])
# FSDP's hooks break Dynamo's graph around each block that has any, and what calls the blocks in a loop then runs as it is.
SITES = {case: sorted(2 * BLOCK) if "fully_shard" in case else WHOLE for case in program.CASES} | {"tensor parallel, optimized": []}
QUICK = ["DDP of a checkpointed module", "fully_shard of an optimized module", "tensor parallel, optimized"]


def both(cases, directory):
    """What each of two processes saw."""
    command = [sys.executable, "-m", "tests.torch.distributed_program", str(directory), *cases]
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(os.path.join(directory, f"{rank}.pt")) for rank in range(program.RANKS)]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return both(QUICK, tmp_path_factory.mktemp("quick"))


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    return both([case for case in program.CASES if case not in QUICK], tmp_path_factory.mktemp("others"))


def unwrapped(ranks):
    """Losses of the ranks' batches, and the mean of their gradients."""
    model, losses = program.make(), []
    for rank in ranks:
        loss = model(*program.batch(rank))
        (loss / len(ranks)).backward()
        losses.append(loss.item())
    return losses, {n: p.grad for n, p in model.named_parameters()}


def agrees(case, seen):
    ranks = [0, 0] if case in program.SAME_BATCH else [0, 1]
    losses, gradients = unwrapped(ranks)
    for rank, found in enumerate(r[case] for r in seen):
        assert "error" not in found, found["error"]
        assert found["losses"] == pytest.approx([losses[rank]] * 2, rel=1e-5)
        torch.testing.assert_close(found["gradients"], gradients, rtol=1e-4, atol=1e-6)
        assert found["sites"] == SITES[case], found["notes"]


@pytest.mark.parametrize("case", QUICK)
def test_two_processes(case, quick):
    agrees(case, quick)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in program.CASES if case not in QUICK])
def test_two_processes_in_other_wrappings(case, others):
    agrees(case, others)


def test_kernels_are_not_handed_tensors_that_lie_on_several_devices(quick):
    (note,) = quick[0]["tensor parallel, optimized"]["notes"]
    assert "runs as it was written: it computes with DTensor" in note

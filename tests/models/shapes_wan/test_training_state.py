# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn
from training_state import ResumeError, TrainingState


def make_state():
    torch.manual_seed(0)
    modules = nn.ModuleDict({"layer": nn.Linear(3, 3)})
    return TrainingState(
        modules,
        torch.optim.AdamW(modules.parameters(), lr=0.1),
        torch.Generator().manual_seed(1),
        ema=[parameter.detach().clone() for parameter in modules.parameters()],
    )


def train(state, until):
    while state.iteration < until:
        inputs = torch.randn(4, 3, generator=state.generator)
        state.modules["layer"](inputs).square().mean().backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.iteration += 1
        state.update_ema()


def test_restored_state_continues_as_if_never_stopped(tmp_path):
    whole = make_state()
    train(whole, 6)

    stopped = make_state()
    train(stopped, 3)
    stopped.save(tmp_path / "state.pt", {"iterations": 6})
    resumed = make_state()
    assert resumed.restore(tmp_path / "state.pt", {"iterations": 6})
    assert resumed.iteration == 3
    train(resumed, 6)

    for name, tensor in whole.modules.state_dict().items():
        assert torch.equal(tensor, resumed.modules.state_dict()[name])
    assert all(map(torch.equal, whole.ema, resumed.ema))


def test_restore_without_a_file_leaves_the_state(tmp_path):
    state = make_state()
    assert not state.restore(tmp_path / "absent.pt", {})
    assert state.iteration == 0


def test_other_settings_are_refused_with_both_values(tmp_path):
    make_state().save(tmp_path / "state.pt", {"batch": 16, "iterations": 6})
    with pytest.raises(ResumeError) as caught:
        make_state().restore(tmp_path / "state.pt", {"batch": 8, "iterations": 7})
    message = str(caught.value)
    assert "state.pt" in message
    assert "'batch' is 16 but this run asks for 8" in message
    assert "'iterations' is 6 but this run asks for 7" in message
    assert "--work-dir" in message


def test_failed_save_keeps_the_former_file(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    state = make_state()
    state.save(path, {})
    before = path.read_bytes()

    def fail(content, file):
        file.write(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        state.save(path, {})
    assert path.read_bytes() == before


def test_average_follows_parameters_slowly():
    state = make_state()
    state.iteration = 10**6
    before = [average.clone() for average in state.ema]
    with torch.no_grad():
        for parameter in state.modules.parameters():
            parameter.add_(1.0)
    state.update_ema()
    for average, old in zip(state.ema, before, strict=True):
        torch.testing.assert_close(average - old, torch.full_like(old, 1e-3), rtol=1e-3, atol=1e-6)

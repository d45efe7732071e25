"""What a run ended with, to compare it bit for bit with what another did."""

from __future__ import annotations

from pathlib import Path

from train.checkpoint import list_checkpoints, load_weights


def final_state(run: Path) -> dict[str, bytes]:
    """Every tensor of the last checkpoint, as bytes."""
    state = load_weights(list_checkpoints(run / "checkpoints")[-1])
    moments = state["optimizer"]["state"]
    assert isinstance(moments, dict)
    tensors = dict(state["network"])
    tensors |= {f"moment {i} {name}": x for i, m in moments.items() for name, x in m.items()}
    tensors["rng"] = state["torch_rng"]
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}

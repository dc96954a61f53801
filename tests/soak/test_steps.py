"""A long run takes no more memory and no more open files at its end than after its first tenth."""

import os
import pathlib

from conftest import one_device, tiny_config

from ekd_jax.runs import checkpoint
from ekd_jax.training import single

STEPS = int(os.environ.get("EKD_JAX_SOAK_STEPS", 10_000))


def resident_bytes():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_flat_memory_and_open_files(tmp_path, monkeypatch):
    """Looked at whenever a checkpoint is saved, with records and evaluations in between."""
    found, save = [], checkpoint.Checkpoints.save

    def look(self, state, *rest):
        save(self, state, *rest)
        self.wait()
        found.append((int(state.step), resident_bytes(), len(os.listdir("/proc/self/fd")),
                      len(os.listdir("/proc/self/task"))))  # fmt: skip

    monkeypatch.setattr(checkpoint.Checkpoints, "save", look)
    per_epoch = 25
    config = tiny_config(
        train__batch_size=8,
        train__epochs=STEPS / per_epoch,
        train__log_every_steps=20,
        train__evaluate_every_epochs=4.0,
        train__checkpoint_every_epochs=2.0,
    )
    assert single.run(config, tmp_path / "run", one_device()).steps == STEPS
    settled = [row for row in found if row[0] >= STEPS / 10]
    for step, memory, files, threads in settled[:: max(len(settled) // 20, 1)]:
        print(f"step {step:6,}: {memory / 1e6:7.1f} MB, {files} open files, {threads} threads")
    memory, files, threads = (
        [column[len(settled) * part // 4 :][: len(settled) // 4] for part in range(4)]
        for column in list(zip(*settled, strict=True))[1:]
    )
    assert max(files[3]) <= max(files[0])
    assert max(threads[3]) <= max(threads[0])
    growth = sorted(memory[3])[len(memory[3]) // 2] - sorted(memory[0])[len(memory[0]) // 2]
    print(f"median of the last quarter less that of the first: {growth / 1e6:.1f} MB")
    assert growth < 20e6, "bytes"

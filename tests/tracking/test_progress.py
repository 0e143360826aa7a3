"""What a person sees: lines into a pipe, a live bar in a pseudo-terminal."""

from __future__ import annotations

import io
import os
import re
import sys

import pytest

from bpfree.step import Phase
from bpfree.tracking.progress import ProgressDisplay


def train(run, display, epochs, *, phases=("train",), status="finished"):
    display.run_start(run)
    for name in phases:
        display.phase_start(run, Phase(name))
    for number in range(1, epochs + 1):
        share = (number - 0.5) / (run.total_epochs or epochs)
        display.progress(run, {"step": 10.0 * number, "epoch": number - 0.5, "progress": share, "rule/loss": 2.0})
        metrics = {
            "epoch": float(number),
            "train/loss": 1 / number,
            "val/loss": 2 / number,
            "val/accuracy": 0.9,
            "samples_per_second": 12345.0,
        }
        run.epoch = number
        run.history.append(metrics)
        display.epoch_end(run, metrics)
    run.status = status
    display.run_end(run)


def test_plain_lines(new_run):
    """Start, first epoch (the others come within two seconds), last epoch, end."""
    stream = io.StringIO()
    train(
        new_run("dfa-digits-s0", total_epochs=50, result={"test/accuracy": 0.875, "train/seconds": 75.0}),
        ProgressDisplay(stream=stream, label="[1/2]"),
        50,
    )
    lines = stream.getvalue().splitlines()
    assert lines[0] == "[1/2] dfa-digits-s0: started, 50 epochs"
    assert lines[1].startswith("[1/2] dfa-digits-s0: epoch 1/50  loss 1  val loss 2  val accuracy 90.00 %  12,345 samples/s")
    assert lines[2].startswith("[1/2] dfa-digits-s0: epoch 50/50  loss 0.02  val loss 0.04")
    assert lines[3] == "[1/2] dfa-digits-s0: finished: test accuracy 87.50 %, 75 s of training"
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("world", "kind", "text"),
    [("2", "blocks", "2 processes share the blocks"), ("8", "data", "8 processes share the examples of each batch"), ("1", "none", "")],
)
def test_several_processes_say_what_they_share(new_run, world, kind, text):
    stream = io.StringIO()
    ProgressDisplay(stream=stream).run_start(new_run("a", tags={"world_size": world, "parallel": kind}))
    assert [line.removeprefix("a: ") for line in stream.getvalue().splitlines()] == ["started", *([text] if text else [])]


def test_the_last_epoch_is_shown_where_the_number_is_not_known(new_run):
    """A budget of seconds: the line that was held back comes with the end."""
    stream = io.StringIO()
    train(new_run(), ProgressDisplay(stream=stream), 5, status="diverged")
    assert "epoch 5  loss 0.2" in stream.getvalue()


def test_a_thousand_phases(new_run):
    """NoProp has one per block and epoch: they must not flood."""
    stream = io.StringIO()
    train(new_run(total_epochs=3), ProgressDisplay(stream=stream), 3, phases=[f"t{i}" for i in range(1000)])
    assert len(stream.getvalue().splitlines()) < 15


def test_interrupted_says_how_to_go_on(new_run):
    """The command is one that a shell takes, whatever the folder's name."""
    stream = io.StringIO()
    run = new_run("my run", total_epochs=9, reason="stopped by SIGINT")
    train(run, ProgressDisplay(stream=stream), 2, status="interrupted")
    assert stream.getvalue().endswith(
        f"my run: interrupted after epoch 2: stopped by SIGINT\n  resume it with: bpfree train --resume '{run.folder}'\n"
    )


@pytest.mark.parametrize(("status", "expected"), [("finished", ""), ("diverged", "rule-task-s0: diverged after epoch 2: loss is nan\n")])
def test_quiet(new_run, status, expected):
    """Nothing but bad news."""
    stream = io.StringIO()
    train(new_run(reason="loss is nan" if status == "diverged" else ""), ProgressDisplay(quiet=True, stream=stream), 2, status=status)
    assert stream.getvalue() == expected


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_live_in_a_terminal(new_run):
    """Two runs in sequence: bars come and go, the cursor comes back, the two results remain as lines."""
    import pty

    main, side = pty.openpty()
    with os.fdopen(side, "w") as terminal:
        for number in (1, 2):
            display = ProgressDisplay(stream=terminal, label=f"[{number}/2]")
            run = new_run(f"run[{number}]", total_epochs=4, result={"test/accuracy": 0.5})
            train(run, display, 4, phases=["sleep"])
        terminal.flush()
        os.set_blocking(main, False)
        output = b""
        while True:
            try:
                output += os.read(main, 65536)
            except BlockingIOError:
                break
    os.close(main)
    text = output.decode()
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 2  # the cursor is hidden and shown
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    for number in (1, 2):
        assert f"[{number}/2] run[{number}]" in plain  # brackets are no markup
        assert re.search(rf"run\[{number}\]: finished: test accuracy 50\.00 %", plain)
    assert "sleep" in plain
    assert "epoch 4/4" in plain


def test_a_run_that_never_begins_takes_nothing_of_the_terminal(new_run):
    """Another observer may refuse the run after this one: no live display may stay behind."""
    main, side = os.openpty()
    with os.fdopen(side, "w") as terminal:
        ProgressDisplay(stream=terminal).run_start(new_run())
        os.set_blocking(main, False)
        with pytest.raises(BlockingIOError):
            os.read(main, 10)
    os.close(main)

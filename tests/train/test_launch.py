"""`--processes N`: as many processes as are asked for, each with its place, and none left when one has failed."""

import time

import pytest

from ropewalk.train import launch


@pytest.fixture
def stands_in(tmp_path, monkeypatch):
    """A script that is started in Python's place: it writes down what it was told; the second of "fail" ends, the others wait."""
    script = tmp_path / "python"
    script.write_text(
        "#!/bin/sh\n"
        f'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $*" > {tmp_path}/told-$RANK\n'
        'if [ "$4" = fail ]; then [ "$RANK" = 1 ] && exit 3; exec sleep 60; fi\n'
    )
    script.chmod(0o755)
    monkeypatch.setattr(launch.sys, "executable", str(script))
    return tmp_path


def test_each_process_is_told_its_place(stands_in):
    assert launch.launch(3, ["run.yml", "seed=1"]) == 0
    told = [(stands_in / f"told-{rank}").read_text().strip() for rank in range(3)]
    assert told == [f"{rank} {rank} 3 127.0.0.1 -m ropewalk train run.yml seed=1" for rank in range(3)]


def test_where_one_fails_the_others_are_ended_and_its_code_is_given(stands_in):
    begun = time.monotonic()
    assert launch.launch(2, ["fail"]) == 3
    assert time.monotonic() - begun < 30

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
from tinygrad import Context, Tensor, helpers

from agents import jitcache
from agents.jitcache import CachedJit, refill, upload


def double(x):
    return (x * 2).contiguous()


def call(jit, x):
    return jit(Tensor(np.array(x, np.float32))).numpy().tolist()


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """A private directory, and a memory that forgets between tests as a new process would."""
    monkeypatch.setattr(jitcache, "_loaded", {})
    tmp_path.chmod(0o700)
    return tmp_path


def test_captured_once_for_each_shape_then_loaded(directory):
    jit = CachedJit(double, "double", cache_dir=directory)
    assert [call(jit, [1, 2]), call(jit, [3, 4]), call(jit, [5])] == [[2, 4], [6, 8], [10]] and jit.captures == 2
    jitcache._loaded.clear()
    again = CachedJit(double, "double", cache_dir=directory)
    assert call(again, [7, 8]) == [14, 16] and again.captures == 0
    other = CachedJit(double, "double", key_parts=("another constant",), cache_dir=directory)
    assert call(other, [7, 8]) == [14, 16] and other.captures == 1
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in directory.iterdir())


class Doubler:
    def double(self, x):
        return (x * 2).contiguous()


def test_a_capture_serves_others_and_does_not_keep_alive_who_made_it(directory):
    first, second = Doubler(), Doubler()
    jit = CachedJit(first.double, "double", cache_dir=directory)
    assert call(jit, [1]) == [2] and jit.captures == 1
    gone = weakref.ref(first)
    del first, jit
    gc.collect()
    assert gone() is None and len(jitcache._loaded) == 1
    jit = CachedJit(second.double, "double", cache_dir=directory)
    assert call(jit, [4]) == [8] and jit.captures == 0


def test_a_damaged_file_is_captured_again_with_one_line(directory, caplog):
    call(CachedJit(double, "double", cache_dir=directory), [1])
    (file,) = directory.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    jitcache._loaded.clear()
    jit = CachedJit(double, "double", cache_dir=directory)
    assert call(jit, [4]) == [8] and jit.captures == 1 and len(caplog.records) == 1
    assert file.stat().st_size > 100


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_directory_that_others_can_write_to_is_not_trusted(directory, mode, caplog):
    call(CachedJit(double, "double", cache_dir=directory), [1])
    jitcache._loaded.clear()
    directory.chmod(mode)
    jit = CachedJit(double, "double", cache_dir=directory)
    assert call(jit, [1]) == [2] and jit.captures == 1 and "not used" in caplog.text
    assert len(list(directory.iterdir())) == 1


def test_a_file_or_link_that_others_can_write_to_is_not_trusted(directory, caplog):
    call(CachedJit(double, "double", cache_dir=directory), [1])
    (file,) = directory.iterdir()
    file.chmod(0o666)
    jitcache._loaded.clear()
    jit = CachedJit(double, "double", cache_dir=directory)
    assert call(jit, [1]) == [2] and jit.captures == 1 and "discarded" in caplog.text
    link = directory.parent / f"{directory.name}-link"
    link.symlink_to(directory)
    assert CachedJit(double, "double", cache_dir=link).directory is None


def test_a_created_directory_is_private_and_settings_are_part_of_the_key(directory):
    jit = CachedJit(double, "double", cache_dir=directory / "new" / "jit")
    assert os.stat(directory / "new" / "jit").st_mode & 0o777 == 0o700
    tensors = [Tensor([1.0])]
    with Context(NOOPT=1 - helpers.NOOPT.value):
        other = jit.key(tensors)
    assert jit.key(tensors) != other and jit.key(tensors) == jit.key(tensors)


@pytest.mark.parametrize("name", ["THREADS", "JITBEAM", "MV"])
def test_what_tinygrad_reads_of_the_environment_alone_is_part_of_the_key(directory, monkeypatch, name):
    jit, tensors = CachedJit(double, "double", cache_dir=directory), [Tensor([1.0])]
    usual = jit.key(tensors)
    monkeypatch.setenv(name, "0")
    assert jit.key(tensors) != usual
    monkeypatch.delenv(name)
    assert jit.key(tensors) == usual


def test_nothing_is_left_where_a_capture_cannot_be_written(directory, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jitcache.pickle, "dump", full)
    jit = CachedJit(double, "double", cache_dir=directory)
    assert call(jit, [1, 2]) == [2, 4] and "could not write" in caplog.text and list(directory.iterdir()) == []


PROCESS = """
import sys; sys.path[:0] = sys.argv[2:]
import hashlib
from conftest import SMALL, Noise
from agents.ppo import PPO
from agents.rollout import Rollouts
agent = PPO(3, 4, 2, SMALL, 0, sys.argv[1])
metrics = agent.update(Rollouts(Noise(), agent, 0).collect(4)[0])
print(agent.trained._jit.captures + agent._forward.captures, hashlib.sha256(agent.policy.theta.numpy().tobytes()).hexdigest())
"""


def test_a_second_process_captures_nothing_and_gets_the_same_numbers(make, cache_dir):
    import hashlib

    agent = make(0)
    agent.update(make.rollout(agent))
    here, root = Path(__file__).parent, Path(__file__).parents[2]
    command = [sys.executable, "-c", PROCESS, str(cache_dir), str(here), str(root)]
    env = {**os.environ, "NOOPT": str(helpers.NOOPT.value)}  # as here: see conftest
    captures, digest = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout.split()
    assert captures == "0" and digest == hashlib.sha256(agent.policy.theta.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("array", [np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(6, dtype=np.int32)[::2],
                                   np.array([[True], [False]]), np.zeros((0, 3), np.float32),
                                   np.broadcast_to(np.float32(2.0), (2, 3)), np.frombuffer(b"abcd", np.int32)])  # fmt: skip
def test_an_upload_is_a_copy_and_as_good_as_a_realized_tensor(array: np.ndarray, directory):
    before, tensor = array.copy(), upload(array)
    assert tensor.shape == array.shape and tensor.dtype == Tensor(before).dtype
    if array.flags.writeable:
        array[...] = 0
    np.testing.assert_array_equal(tensor.numpy(), before)
    refill(tensor, other := np.ascontiguousarray(before[::-1]))
    np.testing.assert_array_equal(tensor.numpy(), other)
    if array.size:
        jit = CachedJit(lambda t: t.cat(t).contiguous(), "twice", cache_dir=directory)
        twice = jit(Tensor(before).realize()).numpy().copy()
        np.testing.assert_array_equal(jit(upload(before)).numpy(), twice)
        assert jit.captures == 1

"""`training/loop.py` on a regression of two numbers: snapshots, resuming to the same bits, what
stops a training, and checkpoints of today's and of the older format.
"""

import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sis_jax import parallel
from sis_jax.data.files import CannotWrite
from sis_jax.training import loop as loops
from sis_jax.training.loop import Checkpoints, Course, Training, loop
from sis_jax.types import SisError, UsageError

ADAM = optax.adam(optax.cosine_decay_schedule(0.1, 100), b1=0.5)
CONFIG = {"rate": 0.1, "sizes": (2, 3)}


def first_state():
    params = {"w": jnp.full((2,), 1.0), "b": jnp.zeros(())}  # `full` is weakly typed, on purpose
    return {"params": params, "opt": ADAM.init(params)}


def batches(first):
    while True:
        yield np.random.default_rng((7, first)).normal(size=(4, 2)).astype(np.float32)
        first += 1


def body(state, x):
    def loss(p):
        return jnp.square(x @ p["w"] + p["b"] - x.sum(1) * 3).mean()

    value, grads = jax.value_and_grad(loss)(state["params"])
    updates, opt = ADAM.update(parallel.pmean(grads), state["opt"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "opt": opt}, {"loss": parallel.pmean(value)}


def step_fn(state, step, x):
    return parallel.map_devices(body, (None, 0), None, devices=1)(state, x[None])


def train(folder, steps=6, step_fn=step_fn, every=2, **settings):
    """A training in `folder` (None: without checkpoints), from where it is."""
    checkpoints = Checkpoints(folder, CONFIG)
    run = checkpoints.restore(first_state(), best=first_state()["params"])
    run = run or Training(first_state(), kept={"best": first_state()["params"]})
    devices = settings.pop("devices", 1)
    course = Course(steps, every, **settings)
    try:
        for step, facts in loop(run, step_fn, batches, course, checkpoints, devices):
            run.curve.append({"step": step} | facts)
            run.kept["best"] = run.state["params"]
    finally:
        checkpoints.close()
    return run


def saved(folder):
    checkpoints = Checkpoints(folder, CONFIG)
    run = checkpoints.restore(jax.eval_shape(first_state), best=first_state()["params"])
    checkpoints.close()
    return run


def same(a, b):
    for x, y in (((a.state, a.kept), (b.state, b.kept)), (a.curve, b.curve)):
        assert jax.tree.structure(x) == jax.tree.structure(y)
        assert all(np.array_equal(p, q) for p, q in zip(jax.tree.leaves(x), jax.tree.leaves(y)))
    assert (a.step, a.number) == (b.step, b.number)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Six steps in one go."""
    folder = tmp_path_factory.mktemp("whole") / "checkpoints"
    return folder, train(folder)


def test_snapshots_and_the_curve(whole):
    assert [row["step"] for row in whole[1].curve] == [2, 4, 6]
    assert whole[1].curve[-1]["loss"] < whole[1].curve[0]["loss"]
    assert [row["step"] for row in train(None, 5).curve] == [2, 4, 5]  # the last one always


def test_without_a_folder_the_numbers_are_the_same(whole):
    same(train(None), whole[1])


def test_optax_state_comes_back_whole(whole):
    run = saved(whole[0])
    same(run, whole[1])
    assert type(run.state["opt"][0]) is optax.ScaleByAdamState
    assert int(run.state["opt"][0].count) == 6 and run.seconds > 0
    assert not (whole[0] / "4").exists()  # the last state replaced the one before


@pytest.mark.parametrize("first", [1, 2, 3])
def test_resumed_to_the_same_bits(whole, tmp_path, first):
    for steps in (first, 6):
        run = train(tmp_path / "c", steps)
    rows = [row for row in run.curve if row["step"] % 2 == 0]  # a stop is one more snapshot
    run.curve = rows
    same(run, whole[1])


def test_killed_in_a_step(whole, tmp_path):
    """The last checkpoint stays, and the training goes on from it to the same bits."""

    def dies(state, step, x):
        if step == 3:
            raise MemoryError
        return step_fn(state, step, x)

    with pytest.raises(MemoryError):
        train(tmp_path / "c", step_fn=dies)
    assert saved(tmp_path / "c").step == 2
    same(train(tmp_path / "c"), whole[1])


def test_killed_while_saving(whole, tmp_path, monkeypatch):
    """Half a checkpoint is not taken for a whole one, and is cleared away."""
    train(tmp_path / "c", 2)
    half = tmp_path / "c" / "4.orbax-checkpoint-tmp-1"
    (half / "arrays").mkdir(parents=True)
    assert saved(tmp_path / "c").step == 2 and not half.exists()
    same(train(tmp_path / "c"), whole[1])


@pytest.fixture
def ctrl_c():
    """Python's own handler, which one in the background lacks; SIGTERM has it, too."""
    both = (signal.SIGINT, signal.SIGTERM)
    usual = {number: signal.signal(number, signal.default_int_handler) for number in both}
    yield
    assert {signal.signal(number, usual[number]) for number in both} == {signal.default_int_handler}


def interrupting(at, times, number=signal.SIGINT):
    def interrupted(state, step, x):
        for _ in range(times * (step == at)):
            os.kill(os.getpid(), number)
        return step_fn(state, step, x)

    return interrupted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_the_step(ctrl_c, whole, tmp_path, number):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "c", step_fn=interrupting(2, 1, number))
    assert saved(tmp_path / "c").step == 3
    same(train(tmp_path / "c"), whole[1])


def test_ctrl_c_twice_does_not_wait(ctrl_c, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "c", step_fn=interrupting(2, 2))
    assert saved(tmp_path / "c").step == 2


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_loss_that_is_not_a_number(ctrl_c, tmp_path, interrupted):
    """A sentence with the step and the cure; the last good checkpoint stays, Ctrl-C or not."""

    def spoiled(state, step, x):
        if step == 2 and interrupted:
            os.kill(os.getpid(), signal.SIGINT)
        state, facts = step_fn(state, step, x)
        return state, facts if step < 2 else {"loss": facts["loss"] * np.nan}

    at = 3 if interrupted else 4
    with pytest.raises(SisError, match=rf"step {at} .*last checkpoint is good.*--rate 1"):
        train(tmp_path / "c", step_fn=spoiled, cure="give --rate 1")
    assert saved(tmp_path / "c").step == 2


def test_a_weight_that_is_not_a_number(tmp_path):
    """Nor does a checkpoint keep weights that the next loss would find broken."""

    def spoiled(state, step, x):
        state, facts = step_fn(state, step, x)
        spoil = np.float32(np.nan if step == 3 else 1)
        return state | {"params": jax.tree.map(lambda a: a * spoil, state["params"])}, facts

    with pytest.raises(SisError, match=r"step 4 \(a weight .*last checkpoint is good"):
        train(tmp_path / "c", step_fn=spoiled)
    assert saved(tmp_path / "c").step == 2


def test_a_disk_without_room_for_a_checkpoint(tmp_path, monkeypatch):
    train(tmp_path / "c", 2)
    room = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: room)
    with pytest.raises(CannotWrite, match=r"the disk is full.*resumes"):
        train(tmp_path / "c")
    assert saved(tmp_path / "c").step == 2


def test_stop_ends_with_a_snapshot(tmp_path):
    run = train(tmp_path / "c", stop=lambda: True)
    assert run.step == 1 and [row["step"] for row in run.curve] == [1]
    assert saved(tmp_path / "c").step == 1
    rows = []
    course = Course(9, 2, stop=lambda: bool(rows))
    run = Training(first_state())
    for _ in loop(run, step_fn, batches, course, Checkpoints(None, CONFIG)):
        rows += [run.step]
    assert rows == [2] and run.step == 2  # asked after the snapshot too, before another step


def test_a_finished_training_is_left_alone(whole):
    before = {p: p.stat().st_mtime_ns for p in whole[0].rglob("*") if p.is_file()}
    same(train(whole[0]), whole[1])
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_phases_number_on(tmp_path):
    """A second phase begins at step 0 with a state of its own; the newer checkpoint is found."""
    checkpoints = Checkpoints(tmp_path / "c", CONFIG)
    run = Training(first_state(), facts={"phase": "one"})
    for _ in loop(run, step_fn, batches, Course(3, 3), checkpoints):
        run.curve.append({"step": run.step})
    run.kept["best"] = run.state["params"]
    run.next_phase(first_state())
    run.facts["phase"] = np.str_("two")
    checkpoints.save(run)
    checkpoints.close()
    back = saved(tmp_path / "c")
    assert (back.step, back.number, back.facts, back.curve) == (0, 4, {"phase": "two"}, run.curve)
    same(back, run)


def test_another_configuration(tmp_path):
    train(tmp_path / "c", 2)
    with pytest.raises(UsageError, match=r"another configuration.*--overwrite"):
        Checkpoints(tmp_path / "c", CONFIG | {"rate": 0.2}).restore(first_state())
    assert saved(tmp_path / "c").step == 2
    gone = Checkpoints(tmp_path / "c", CONFIG | {"rate": 0.2}, discard=True)
    assert gone.restore(first_state()) is None and not (tmp_path / "c").exists()


@pytest.mark.parametrize("params", [{"w": jnp.zeros(3), "b": jnp.zeros(())}, {"w": jnp.zeros(2)}])
def test_another_network(tmp_path, params):
    train(tmp_path / "c", 2)
    state = {"params": params, "opt": ADAM.init(params)}
    with pytest.raises(UsageError, match=r"another network.*--overwrite"):
        Checkpoints(tmp_path / "c", CONFIG).restore(state, best=state["params"])


def older(folder, number, arrays, meta, item="arrays"):
    """A checkpoint as it was written before `FORMAT`: Optax state as a list of its leaves."""
    import orbax.checkpoint as ocp

    save = {item: ocp.args.StandardSave(jax.tree.map(np.asarray, arrays))}
    manager = ocp.CheckpointManager(folder.absolute())
    manager.save(number, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **save))
    manager.wait_until_finished()
    manager.close()


def test_an_older_generator(tmp_path, whole):
    state = whole[1].state | {"opt": jax.tree.leaves(whole[1].state["opt"])}
    meta = {"step": 6, "seconds": 2.5, "curve": whole[1].curve}
    older(tmp_path / "c", 6, state, meta, item="state")
    run = saved(tmp_path / "c")
    assert run.seconds == 2.5 and run.kept == {}
    run.kept = whole[1].kept
    same(run, whole[1])
    assert [row["step"] for row in train(tmp_path / "c", 8).curve] == [2, 4, 6, 8]


def test_an_older_student(tmp_path, whole):
    """In its second phase, with one of the two pytrees that may be kept."""
    state = whole[1].state | {"opt": jax.tree.leaves(whole[1].state["opt"])}
    meta = {"phase": "adapt", "step": 2, "round": 1, "curve": [], "verdict": {"kept": True}}
    meta["held"] = ["state", "best"]
    older(tmp_path / "c", 13, {"state": state, "best": whole[1].kept["best"]}, meta)
    checkpoints = Checkpoints(tmp_path / "c", CONFIG)
    run = checkpoints.restore(first_state(), best=first_state()["params"], other=first_state())
    assert run.facts == {"phase": "adapt", "round": 1, "verdict": {"kept": True}}
    assert (run.step, run.offset, list(run.kept)) == (2, 11, ["best"])
    assert jax.tree.structure(run.state) == jax.tree.structure(first_state())


def test_older_ones_are_discarded_where_that_is_asked(tmp_path):
    older(tmp_path / "c", 1, {"x": np.ones(2)}, {"config": {}, "facts": []})
    assert Checkpoints(tmp_path / "c", CONFIG, discard=True).restore(first_state()) is None
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("devices", [1, 2])
def test_nothing_compiles_twice(caplog, devices):
    """Not the second step, whose state comes from the first, nor after a resume."""
    jax.clear_caches()
    parallel._compiled.cache_clear()

    compiled = []

    def step_fn(state, step, x):
        caplog.clear()
        run = parallel.map_devices(body, (None, 0), None, devices=devices)
        done = run(state, parallel.shard(x, devices)[0])
        compiled.append(sum("Finished XLA" in r.getMessage() for r in caplog.records))
        return done

    with jax.log_compiles(), caplog.at_level("WARNING", logger="jax"):
        run = train(None, 2, step_fn, devices=devices)
        run.state = jax.tree.map(np.asarray, run.state)  # as a checkpoint gives it back
        for _ in loop(run, step_fn, batches, Course(4, 4), Checkpoints(None, CONFIG), devices):
            pass
    assert compiled == [1, 0, 0, 0]


def test_as_csv():
    rows = [{"step": 1, "loss": 0.5, "other": 2}, {"step": 2}]
    assert loops.as_csv(rows, ("step", "loss")) == b"step,loss\r\n1,0.5\r\n2,\r\n"

"""Laws of hostile checkpoints: each is refused in one line, or the run goes on from it with finite weights."""

import io
import json
import os
import pickle
import random
import shutil
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sapo.errors import CheckpointError, TrainingError
from sapo.runs import untrusted
from sapo.runs.checkpoint import MANIFEST_FILE, seal, verify
from tests.faults.children import build
from tests.faults.mutations import damaged, mutated
from tests.faults.trials import check_one_line, trials

STEPS = 2
OPTIONS = {"max_steps": STEPS + 1, "save_steps": STEPS, "max_nonfinite_steps": 1, "steps_per_generation": 4}


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "lora"])
def original(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    build(folder / "run", lora=request.param, **OPTIONS | {"max_steps": STEPS}).train()
    return folder / "run" / f"checkpoint-{STEPS}", request.param


def resume(checkpoint, lora):
    """Go on from it to the end; the run's folder is beside it."""
    trainer = build(checkpoint.parent, lora=lora, **OPTIONS | {"save_strategy": "no"})
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert all(torch.isfinite(weight).all() for weight in trainer.policy().parameters())
    return trainer


def refused_or_trained(checkpoint, lora):
    """The error in one line, or None."""
    try:
        resume(checkpoint, lora)
    except (CheckpointError, TrainingError) as error:
        check_one_line(error)
        return error
    return None


def fresh(original, where):
    shutil.rmtree(where, ignore_errors=True)
    shutil.copytree(original, where / original.name)
    return where / original.name


@settings(max_examples=trials(15, 250), deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**63))
def test_a_damaged_checkpoint_is_refused(original, tmp_path_factory, seed):
    rng = random.Random(seed)
    checkpoint = fresh(original[0], tmp_path_factory.getbasetemp() / "damaged")
    file = rng.choice(sorted(path for path in checkpoint.rglob("*") if path.is_file()))
    before = file.read_bytes()
    if rng.random() < 0.2:
        file.unlink()
    else:
        file.write_bytes(damaged(before, rng))
    if not file.exists() or (file.read_bytes() != before and not same_manifest(file, before)):
        assert isinstance(refused_or_trained(checkpoint, original[1]), CheckpointError), file


def same_manifest(file, before):
    """Whether only the look of the manifest has changed."""
    try:
        return file.name == MANIFEST_FILE and json.loads(file.read_bytes()) == json.loads(before)
    except (ValueError, RecursionError):
        return False


@settings(max_examples=trials(12, 250), deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**63))
def test_a_forged_checkpoint_is_refused_or_trains_on_with_finite_weights(original, tmp_path_factory, seed):
    rng = random.Random(seed)
    checkpoint = fresh(original[0], tmp_path_factory.getbasetemp() / "forged")
    forge(rng.choice(sorted(path for path in checkpoint.rglob("*") if path.is_file())), rng)
    # As a careful forger does.
    seal(checkpoint)
    refused_or_trained(checkpoint, original[1])


def forge(file, rng):
    if file.suffix == ".json" and rng.random() < 0.8:
        file.write_text(json.dumps(mutated(json.loads(file.read_text()), rng)))
    elif file.suffix == ".safetensors" and rng.random() < 0.8:
        tensors = load_file(file)
        name = rng.choice(sorted(tensors))
        tensors[name] = forged(tensors[name], rng)
        if rng.random() < 0.1:
            del tensors[name]
        save_file(tensors, file)
    else:
        file.write_bytes(damaged(file.read_bytes(), rng))


def forged(tensor, rng):
    change = rng.randrange(6)
    if change == 0:
        return tensor[:-1].clone() if tensor.dim() and len(tensor) else torch.zeros(3)
    if change == 1:
        return torch.full_like(tensor, rng.choice([-1, 0, 2**40]))
    if change == 2 and tensor.is_floating_point():
        return torch.full_like(tensor, rng.choice([float("nan"), float("inf"), 1e30]))
    if change == 3:
        return tensor.flatten()
    if change == 4:
        return tensor.float() if not tensor.is_floating_point() else tensor.long()
    return torch.cat([tensor, tensor]) if tensor.dim() else torch.zeros(2)


class Shell:
    """What a pickle does that means harm."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_in_a_checkpoint_is_not_run(original, tmp_path, name):
    checkpoint = fresh(original[0], tmp_path / "run")
    torch.save({"state": Shell(tmp_path / "owned")}, checkpoint / name)
    seal(checkpoint)
    with pytest.raises(CheckpointError, match="a part of it cannot be read"):
        resume(checkpoint, original[1])
    assert not (tmp_path / "owned").exists()


def test_even_a_library_that_asks_for_pickles_gets_none(tmp_path):
    torch.save({"state": Shell(tmp_path / "owned")}, tmp_path / "states.pt")
    with pytest.raises(CheckpointError, match="a part of it cannot be read"), untrusted.reading(tmp_path):
        torch.load(tmp_path / "states.pt", weights_only=False)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_the_index_of_a_distributed_checkpoint_cannot_run_code(original, tmp_path, protocol):
    checkpoint = fresh(original[0], tmp_path / "run")
    (checkpoint / "optimizer_0").mkdir()
    (checkpoint / "optimizer_0" / ".metadata").write_bytes(pickle.dumps(Shell(tmp_path / "owned"), protocol))
    seal(checkpoint)
    with pytest.raises(CheckpointError, match=r"it refers to posix\.mkdir"):
        resume(checkpoint, original[1])
    assert not (tmp_path / "owned").exists()


def test_the_parts_of_a_distributed_checkpoint_lie_beside_its_index(tmp_path):
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

    def write(name):
        index = Metadata(state_dict_metadata={}, storage_data={MetadataIndex("w"): _StorageInfo(name, 0, 1)})
        (tmp_path / ".metadata").write_bytes(pickle.dumps(index))

    (tmp_path / "trainer_state.json").write_text('{"global_step": 2}')
    write("__0_0.distcp")
    assert untrusted.inspect(tmp_path).global_step == 2
    write("../../secret")
    with pytest.raises(CheckpointError, match="outside its folder"):
        untrusted.inspect(tmp_path)


def test_names_in_a_checkpoint_cannot_leave_its_folder(original, tmp_path):
    checkpoint = fresh(original[0], tmp_path / "run")
    outside = tmp_path / "secret.safetensors"
    outside.write_bytes((checkpoint / "opponent.safetensors").read_bytes())
    manifest = json.loads((checkpoint / MANIFEST_FILE).read_text())
    for name in ("../../secret.safetensors", str(outside)):
        forged_manifest = manifest | {name: manifest["opponent.safetensors"]}
        (checkpoint / MANIFEST_FILE).write_text(json.dumps(forged_manifest))
        with pytest.raises(CheckpointError, match="is outside this folder"):
            verify(checkpoint)
    (checkpoint / MANIFEST_FILE).write_text(json.dumps(manifest))
    (checkpoint / "opponent.safetensors").unlink()
    (checkpoint / "opponent.safetensors").symlink_to(outside)
    with pytest.raises(CheckpointError, match="is outside this folder"):
        verify(checkpoint)


def test_a_file_that_a_library_would_take_up_is_refused_and_notes_are_not(original, tmp_path):
    checkpoint = fresh(original[0], tmp_path / "run")
    (checkpoint / "notes.txt").write_text("the best so far")
    verify(checkpoint)
    with zipfile.ZipFile(checkpoint / "pytorch_model.bin", "w"):
        pass
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: is not part of the saved"):
        verify(checkpoint)


def test_deepspeed_is_sent_to_no_other_folder(tmp_path):
    (tmp_path / "trainer_state.json").write_text('{"global_step": 2}')
    (tmp_path / "latest").write_text("../elsewhere\n")
    with pytest.raises(CheckpointError, match="outside its folder"):
        untrusted.inspect(tmp_path)


def test_a_checkpoint_of_other_weights_is_refused(original, tmp_path):
    checkpoint = fresh(original[0], tmp_path / "run")
    file = checkpoint / ("adapter_model.safetensors" if original[1] else "model.safetensors")
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, file)
    seal(checkpoint)
    with pytest.raises(CheckpointError, match=r"are not this model's: 1 names differ"):
        resume(checkpoint, original[1])


def test_the_inspector_reads_what_torch_writes():
    from torch.distributed.checkpoint.metadata import Metadata, TensorProperties, TensorStorageMetadata

    known = Metadata({"w": TensorStorageMetadata(TensorProperties(torch.bfloat16), torch.Size([2]), [])})
    assert untrusted._Inspector(io.BytesIO(pickle.dumps(known))).load() == known

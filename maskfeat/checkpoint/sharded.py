"""Sharded checkpoints: a folder to which every rank writes its shards asynchronously (torch.distributed.checkpoint),
and from which any number of ranks can load.

NAME.dcp/ holds tensors by flat names (`model.<released name>`, `optim.<released name>.<slot>`) in `__<rank>_*.distcp`,
their positions in `.metadata`, everything else in `plain.json`, and the SHA-256 of each file in `SHA256SUMS` (for
`sha256sum -c`). The folder gets its name once everything is on disk.
"""

import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from maskfeat.checkpoint.atomic import replace_folder, sha256, write_and_fsync
from maskfeat.checkpoint.sharded_files import METADATA, PLAIN, SUMS, Reader, TensorMetadata, sums_of, tensors_of, verify
from maskfeat.checkpoint.weights import ReleasedModule, list_problems
from maskfeat.distributed.collectives import broadcast_buffers
from maskfeat.errors import UserError, UserFileError

SUFFIX = ".dcp"
MODEL, OPTIMIZER = "model.", "optim."

Group = dist.ProcessGroup | None
Result = TypeVar("Result")

# Ranks read independently, and a single process has no process group: PyTorch warns of both every time.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def training_tensors(objective: ReleasedModule, optimizer: Optimizer | None = None) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by flat names: full or sharded, not copied.

    Collective: buffers, which each rank has its own copy of, are set to those of rank 0.
    """
    broadcast_buffers(objective)
    tensors = {MODEL + name: value for name, value in objective.released_state().items()}
    if optimizer is not None:
        for name, parameter in objective.named_parameters():
            for slot, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{OPTIMIZER}{objective.released_name(name)}.{slot}"] = value
    return tensors


def load_training(folder: str | Path, objective: ReleasedModule, optimizer: Optimizer, group: Group = None) -> None:
    """Load weights and optimizer state in place. Collective; `group` as in `load_sharded`.

    Raises:
        UserError: as `load_sharded`, on every rank.
    """
    names = {id(parameter): objective.released_name(name) for name, parameter in objective.named_parameters()}

    def create_slots() -> None:
        """Create the optimizer's state, which it would otherwise create in its first step."""
        found: dict[str, dict[str, TensorStorageMetadata]] = {}
        for name, value in tensors_of(Path(folder)).items():
            owner, _, slot = name.removeprefix(OPTIMIZER).rpartition(".")
            if name.startswith(OPTIMIZER):
                found.setdefault(owner, {})[slot] = value
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                for slot, value in found.get(names[id(parameter)], {}).items():
                    if slot in optimizer.state[parameter]:
                        continue
                    if value.size == parameter.shape:
                        empty = torch.zeros_like(parameter, requires_grad=False)
                    else:  # step counts, which fused kernels keep on the device
                        device = parameter.device if group["fused"] else torch.device("cpu")
                        empty = torch.zeros(value.size, dtype=value.properties.dtype, device=device)
                    optimizer.state[parameter][slot] = empty

    _on_all_ranks(create_slots, group)
    load_sharded(folder, training_tensors(objective, optimizer), group)


class SaveHandle:
    """A checkpoint that is being written.

    Attributes:
        folder: its path once it is complete.
    """

    def __init__(self, folder: Path, work: "Future[None]") -> None:
        self.folder, self._work, self._waited_for = folder, work, False

    def done(self) -> bool:
        """Return whether writing has finished or failed."""
        return self._work.done()

    def wait(self) -> None:
        """Wait until the checkpoint is complete.

        Raises:
            UserFileError: on every rank, if it could not be written; the message names the folder, and an earlier
                checkpoint of this name is unchanged.
        """
        self._waited_for = True
        self._work.result()

    def end(self) -> None:
        """Wait before another checkpoint is begun; raises an error only if `wait` has not been called.

        Raises:
            UserFileError: as `wait`.
        """
        if self._waited_for:
            self._work.exception()
        else:
            self.wait()


_pending: SaveHandle | None = None


def save_sharded(
    folder: str | Path, tensors: Mapping[str, Tensor], plain: Mapping[str, Any], group: Group = None
) -> SaveHandle:
    """Start writing a checkpoint in the background. Collective.

    Tensors are copied to the CPU before this returns and may be changed afterwards. One checkpoint is written at a
    time: a call waits for the previous one and raises its error if `wait` was not called.

    Args:
        folder: path that ends in `.dcp`; an existing folder of this name is replaced.
        tensors: by flat names, see `training_tensors`.
        plain: everything else, of types that JSON supports; equal on all ranks.
        group: a gloo process group of all ranks that nothing else uses while a checkpoint is written, since the writing
            threads communicate in it. None = the default group, which must then be gloo and otherwise unused. Without
            a process group, this process writes alone.

    Raises:
        UserFileError: if the folder cannot be created, or the previous checkpoint could not be written.
    """
    global _pending
    if _pending is not None:
        previous, _pending = _pending, None
        previous.end()
    folder = Path(folder)
    text = json.dumps(dict(plain), indent=1, allow_nan=False)
    partial = folder.with_name(f".{folder.name}.partial")
    rank = dist.get_rank(group) if dist.is_initialized() else 0

    def create_folder() -> None:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    try:
        _on_all_ranks(create_folder, group, OSError)
        writing = dcp.async_save(dict(tensors), storage_writer=_Writer(partial), process_group=group)
    except OSError as error:
        raise UserFileError(f"could not write the checkpoint {folder}: {error}") from error
    assert isinstance(writing, Future)  # only an asynchronous stager would return something else
    worker = ThreadPoolExecutor(1, "sharded_checkpoint")
    _pending = SaveHandle(folder, worker.submit(_finish, writing, partial, folder, text, rank, group))
    worker.shutdown(wait=False)
    return _pending


class _Writer(dcp.FileSystemWriter):
    def storage_meta(self) -> None:
        """Return None: PyTorch's own metadata would name the folder in which the checkpoint was written."""


def _finish(writing: "Future[Any]", partial: Path, folder: Path, plain: str, rank: int, group: Group) -> None:
    """Wait for PyTorch to write its files, add the others, and rename the folder. Runs in a thread."""

    def sums_of_this_rank() -> dict[str, str]:
        names = [path.name for path in partial.glob(f"__{rank}_*")]
        if rank == 0:
            write_and_fsync(partial / PLAIN, plain.encode())
            names += [METADATA, PLAIN]
        return {name: sha256(partial / name) for name in names}

    def publish() -> None:
        if rank:
            return
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
        write_and_fsync(partial / SUMS, lines.encode())
        replace_folder(partial, folder)

    try:
        writing.result()
        sums = {
            name: digest for part in _on_all_ranks(sums_of_this_rank, group, OSError) for name, digest in part.items()
        }
        _on_all_ranks(publish, group, OSError)
    except dcp.CheckpointException as error:  # the same on all ranks; a BaseException
        why = "; ".join(f"rank {number}: {failure}" for number, (failure, _) in error.failures.items())
        raise _failed(folder, partial, rank, why) from error
    except (OSError, RuntimeError) as error:  # RuntimeError: another rank has exited
        raise _failed(folder, partial, rank, error) from error


def _failed(folder: Path, partial: Path, rank: int, why: object) -> UserFileError:
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
    return UserFileError(f"could not write the checkpoint {folder}: {why}")


def read_sharded_plain(folder: str | Path) -> dict[str, Any]:
    """Read what `save_sharded` was given as `plain`.

    Raises:
        UserError: if it is missing or damaged.
    """
    folder = Path(folder)
    verify(folder, [PLAIN])
    try:
        content = json.loads((folder / PLAIN).read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder / PLAIN} is no JSON, and is not loaded: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{folder / PLAIN} holds a {type(content).__name__}, expected an object")
    return content


def load_sharded(folder: str | Path, tensors: Mapping[str, Tensor], group: Group = None) -> None:
    """Load full or sharded tensors in place from a checkpoint written by any number of ranks. Collective.

    All files are verified, shared among the ranks, before any tensor is changed.

    Args:
        tensors: by flat names; exactly those of the checkpoint.
        group: a process group of all ranks; None = the default group.

    Raises:
        UserError: on all ranks, if a file is missing or damaged or holds more than tensors, or if names, shapes or
            dtypes differ.
    """
    folder = Path(folder)
    rank, size = (dist.get_rank(group), dist.get_world_size(group)) if dist.is_initialized() else (0, 1)
    _on_all_ranks(lambda: verify(folder, sorted(sums_of(folder))[rank::size]), group)
    _on_all_ranks(lambda: _check_names(folder, tensors_of(folder), tensors), group)
    _on_all_ranks(lambda: _load(folder, tensors), group)


def full_tensors(folder: str | Path, prefix: str = MODEL) -> dict[str, Tensor]:
    """Load full tensors on the CPU by their names after `prefix`. Not collective.

    Raises:
        UserError: as `load_sharded`.
    """
    folder = Path(folder)
    verify(folder)
    found = tensors_of(folder)
    tensors = {
        name: torch.zeros(value.size, dtype=value.properties.dtype)
        for name, value in found.items()
        if name.startswith(prefix)
    }
    _load(folder, tensors)
    return {name.removeprefix(prefix): value for name, value in tensors.items()}


def _check_names(folder: Path, found: TensorMetadata, tensors: Mapping[str, Tensor]) -> None:
    problems = [f"{name} is not in the checkpoint" for name in tensors if name not in found]
    problems += [f"{name} is in the checkpoint but not in this run" for name in found if name not in tensors]
    for name, tensor in tensors.items():
        if name in found:
            theirs = tuple(found[name].size), found[name].properties.dtype
            if theirs != (tuple(tensor.shape), tensor.dtype):
                problems.append(f"{name} is {theirs}, expected {tuple(tensor.shape), tensor.dtype}")
    if problems:
        raise UserError(f"{folder} is of another model or optimizer than this run:\n  {list_problems(problems)}")


def _load(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Load the shards of this rank. Not collective."""
    try:
        dcp.load(dict(tensors), storage_reader=Reader(folder), no_dist=True)
    except dcp.CheckpointException as error:
        raise UserError(
            f"{folder} cannot be read: {[str(failure) for failure, _ in error.failures.values()]}"
        ) from error


def _on_all_ranks(job: Callable[[], Result], group: Group, kind: type[Exception] = ValueError) -> Sequence[Result]:
    """Run `job` and return the results of all ranks; an error of type `kind` on any rank is raised on all, as a
    UserError where it was one.
    """
    error = result = None
    try:
        result = job()
    except kind as caught:
        error = caught
    if not dist.is_initialized():
        if error is not None:
            raise error
        return [result]  # type: ignore[list-item]
    every: list[Any] = [None] * dist.get_world_size(group)
    raised = UserError if issubclass(UserError, kind) and isinstance(error, UserError) else kind
    dist.all_gather_object(every, (result, None if error is None else (raised, str(error))), group)
    for number, (_, failure) in enumerate(every):
        if failure is not None:
            raised, text = failure
            raise raised(f"rank {number}: {text}") from error
    return [result for result, _ in every]

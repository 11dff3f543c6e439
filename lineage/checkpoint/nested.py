"""Which of a pickle's nested values are the model's tensors, and under which names.

Trainers wrap the state dictionary in others (`state_dict`, `model`, …) next to optimizers and counters, and some
save whole modules. What was unwrapped or left aside is said in a note.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from lineage.checkpoint.pickles import Thing
from lineage.errors import InputError, printable

__all__ = ["unwrap"]

#: keys under which trainers keep the model, best first; averaged weights come after those of the last step
_WRAPPERS = (
    "state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "generator", "params",
    "parameters", "weights", "state", "ema_state_dict", "model_ema", "params_ema", "ema_model", "ema", "shadow",
)  # fmt: skip
#: keys of training state, which may hold tensors that are no weights
_TRAINING = ("optim", "lr_sched", "scheduler", "scaler", "rng", "callbacks", "loops", "random", "amp", "grad")
#: prefixes that wrappers of modules put before every name
_PREFIXES = ("module.", "_orig_mod.")
_MAX_DEPTH = 40
#: values visited: shared sub-dictionaries must not multiply
_MAX_VISITS = 2**22

IsTensor = Callable[[Any], bool]


def unwrap(path: str, root: Any, is_tensor: IsTensor) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The model's tensors by name, and notes on what was unwrapped, stripped and left aside.

    Raises
    ------
    InputError : two tensors of one name, or a structure without end
    """
    if is_tensor(root):
        return {"tensor": root}, ()
    notes: list[str] = []
    inner, way, aside = _descend(path, root, is_tensor)
    if way:
        notes.append(f"the tensors stand under {'.'.join(way)}")
    if aside:
        notes.append(f"{', '.join(aside)} in the same file holds tensors too and is not read")
    tensors: dict[str, Any] = {}
    for name, value in _walk(path, inner, is_tensor, top=not way):
        if name in tensors:
            raise InputError(path, f'two tensors named "{printable(name, 80)}"')
        tensors[name] = value
    for prefix in _PREFIXES * 2:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
            notes.append(f"every name began with {prefix}, which is left out")
    return tensors, tuple(notes)


def _descend(path: str, root: Any, is_tensor: IsTensor) -> tuple[Any, list[str], list[str]]:
    """The dictionary that holds the model, the keys that lead there, and other keys with models in them."""
    way: list[str] = []
    aside: list[str] = []
    for _ in range(8):
        table = _children(root)
        found = {key: count for key in _WRAPPERS if key in table and (count := _count(path, table[key], is_tensor))}
        direct = sum(map(is_tensor, table.values()))
        best = next(iter(found), None)
        if best is None or found[best] < direct or is_tensor(table[best]):
            break
        rest = [
            value for key, value in table.items() if key not in found and not _training(key) and not is_tensor(value)
        ]
        if _is_module(root) or sum(_count(path, value, is_tensor) for value in rest) > found[best]:
            break
        way.append(best)
        aside.extend(key for key in found if key != best)
        root = table[best]
    return root, way, aside


def _training(key: Any) -> bool:
    return isinstance(key, str) and key.lower().startswith(_TRAINING)


def _is_module(value: Any) -> bool:
    """True for a whole pickled module."""
    return isinstance(value, Thing) and isinstance(value.state, dict) and "_parameters" in value.state


def _children(value: Any) -> dict[Any, Any]:
    """What a value holds by name: items, places in a list, a module's parameters, buffers and modules."""
    if isinstance(value, dict):
        return value
    if isinstance(value, (list, tuple)):
        return dict(enumerate(value))
    if _is_module(value):
        merged: dict[Any, Any] = {}
        hidden = value.state.get("_non_persistent_buffers_set") or ()
        for part in ("_parameters", "_buffers", "_modules"):
            members = value.state.get(part)
            if isinstance(members, dict):
                merged.update((k, v) for k, v in members.items() if part != "_buffers" or k not in hidden)
        return merged
    if isinstance(value, Thing):
        return value.items or dict(enumerate(value.values))
    return {}


def _count(path: str, value: Any, is_tensor: IsTensor) -> int:
    """Tensors inside a value."""
    return 1 if is_tensor(value) else sum(1 for _ in _walk(path, value, is_tensor, top=False))


def _walk(path: str, root: Any, is_tensor: IsTensor, *, top: bool) -> Iterator[tuple[str, Any]]:
    """Every tensor with its dotted name, in order; training state is left out at the top of a file."""
    stack: list[tuple[str, Any, int]] = [("", root, 0)]
    visits = 0
    while stack:
        prefix, value, depth = stack.pop()
        if is_tensor(value):
            yield prefix, value
            continue
        children = _children(value)
        visits += 1 + len(children)
        if depth > _MAX_DEPTH or visits > _MAX_VISITS:
            raise InputError(path, "its dictionaries are nested too deep for a model")
        for key, child in reversed(children.items()):
            if not isinstance(key, (str, int)) or (top and depth == 0 and _training(key)):
                continue
            if is_tensor(child) or isinstance(child, (dict, list, tuple, Thing)):
                stack.append((f"{prefix}.{key}" if prefix else str(key), child, depth + 1))

"""accelerate's ``DynamoBackend`` is a closed enum: ``TrainingArguments(torch_compile_backend="fastft")`` raises
``'FASTFT' is not a valid DynamoBackend`` before torch is asked whether it knows the backend. This adds the member.
"""

from __future__ import annotations

import enum
from types import ModuleType
from typing import Any

from fastft.bridges._bridge import NotNeeded, StayOut, attribute

MEMBER = "FASTFT"


def apply(module: ModuleType) -> None:
    """Add ``DynamoBackend.FASTFT``, whose value is ``"FASTFT"`` as the values of the others are their names."""
    backends: Any = attribute(module, "DynamoBackend")
    if str not in getattr(backends, "__mro__", ()) or enum.Enum not in backends.__mro__:
        raise StayOut("DynamoBackend is not an enum of strings any more")
    if any(member.name != member.value for member in backends):
        raise StayOut("DynamoBackend's values are not its members' names in capitals any more")
    if MEMBER in backends.__members__:
        raise NotNeeded("accelerate knows the backend itself")
    member: Any = str.__new__(backends, MEMBER)
    member._name_ = member._value_ = MEMBER
    member.__objclass__ = backends
    # EnumMeta forbids assigning members through the class; these three are where the class looks for them.
    backends._member_map_[MEMBER] = member
    backends._member_names_.append(MEMBER)
    backends._value2member_map_[MEMBER] = member
    type.__setattr__(backends, MEMBER, member)
    if backends(MEMBER) is not member or backends[MEMBER] is not member:
        raise StayOut("the member was added, but DynamoBackend does not find it")


def refuse(module: ModuleType, why: str) -> None:
    """In the bridge's absence: accelerate's error says what to use."""
    backends: Any = attribute(module, "DynamoBackend")
    stock = backends._missing_

    def _missing_(cls: Any, value: Any) -> Any:
        if value == MEMBER:
            raise ValueError(
                f"accelerate does not know the backend fastft (fastft's bridge accelerate_backend is missing: {why}); "
                "compile the model yourself: model.compile(backend='fastft'), without torch_compile_backend"
            )
        return stock(value)

    if MEMBER not in backends.__members__:
        backends._missing_ = classmethod(_missing_)

"""What a file wants that it may not have, in words, and the options that would let it have that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bntools.trust import DOTTED, Refusal, is_standard

__all__ = ["refusal"]


def refusal(unknown: Mapping[str, set[str]], forbidden: Sequence[str]) -> Refusal:
    """The verdict on a file: names that nobody allows, with their uses, and what else it does."""
    hostile = sorted(n for n, uses in unknown.items() if not _can_be_allowed(n, uses))
    others = sorted(unknown.keys() - set(hostile))
    if hostile or forbidden:
        asks = [f"it asks for {', '.join(hostile)}"] if hostile else []
        also = f" (besides, it wants {', '.join(others)})" if others else ""
        return Refusal(
            f"{'; '.join([*asks, *dict.fromkeys(forbidden)])}, which can run any code, and was not "
            f"run{also}. If you made the file, save model.state_dict() instead and load it with "
            "--arch, or add --trust, which runs whatever is in it; if not, do not use it",
            wanted=tuple(sorted(unknown)),
        )
    options = [n.replace("__main__.", "MODULE.") for n in others]
    script = " (MODULE is the importable file that defines it)" if options != others else ""
    return Refusal(
        f"it holds objects of classes that bntools does not know: {', '.join(others)}. If you "
        f"trust the file, add {' '.join(f'--allow {n}' for n in options)}{script}; "
        f"in Python allow=({', '.join(repr(n) for n in options)},)",
        tuple(part for n in options for part in ("--allow", n)),
        tuple(others),
    )


def _can_be_allowed(name: str, uses: set[str]) -> bool:
    # Only names are offered for pasting into a shell; and what is only called is a function,
    # unless it looks like a class.
    looks_like_a_class = uses != {"call"} or name.rpartition(".")[2][:1].isupper()
    return bool(DOTTED.fullmatch(name)) and looks_like_a_class and not is_standard(name)

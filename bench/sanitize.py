"""Small cases of every op, compared with the reference bit for bit: what compute-sanitizer runs.

    compute-sanitizer --tool racecheck python bench/sanitize.py --device cuda

Few kernels and small tensors, since the sanitizer slows each of them down by orders of magnitude.
The sizes end in every way a tile or a mask word can end.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import issp  # noqa: E402  (found through the line above, also before installation)
from issp import backends, ops, reference  # noqa: E402

SIZES = (1, 2, 31, 33, 1000, 4096, 4097, 70_001)
DTYPES = (torch.float32, torch.bfloat16)


def equal(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Bitwise, wherever the tensors live."""
    mine, theirs = mine.cpu().contiguous(), theirs.contiguous()
    return torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))


def step_cases(device: str, dtype: torch.dtype):
    """Three steps with and without ties and brackets, then masks: (name, equal) pairs."""
    for ties in (False, True):
        random = torch.Generator().manual_seed(7)
        start = [torch.randn(n, generator=random) for n in SIZES]
        if ties:
            start = [(w * 2).round() for w in start]
        theirs = [w.to(dtype) for w in start]
        mine = [w.to(device, copy=True) for w in theirs]
        k = [issp.num_pruned(n, 0.9) for n in SIZES]
        state, oracle = ops.ShrinkState(mine, k), ops.ShrinkState(theirs, k)
        for i, bracket in enumerate((False, True, True)):
            ops.soft_shrink_(mine, state, 0.95, bracket=bracket)
            reference.soft_shrink_(
                theirs, oracle.k, 0.95, oracle.thresholds, oracle.packed, oracle.flips,
                oracle.scratch,
            )  # fmt: skip
            pairs = list(zip(mine, theirs, strict=True))
            pairs += [(getattr(state, x), getattr(oracle, x)) for x in ("thresholds", "packed")]
            pairs += [(state.flips, oracle.flips)]
            yield f"soft_shrink_ {dtype} ties {ties} step {i}", all(equal(*p) for p in pairs)
        found = ops.magnitude_threshold(mine, k)
        yield (
            f"magnitude_threshold {dtype} ties {ties}",
            equal(found, reference.magnitude_threshold(theirs, k)),
        )
        ops.apply_masks_(mine, state)
        reference.apply_masks_(theirs, oracle.packed)
        yield f"apply_masks_ {dtype} ties {ties}", all(map(equal, mine, theirs))


def nm_cases(device: str, dtype: torch.dtype):
    """N:M patterns in both layouts: (name, equal) pairs."""
    weight = torch.randn(8, 64, 3, 3, generator=torch.Generator().manual_seed(3)).to(dtype)
    for n, m, v, layout in ((2, 4, 1, "channels"), (2, 32, 4, "channels"), (1, 36, 1, "flat")):
        keep = issp.Keep(n, of=m, v=v, layout=layout)
        mine = ops.nm_prune(weight.to(device), keep)
        theirs, _ = reference.nm_prune(weight, n, m, v, layout)
        yield f"nm_prune {dtype} {n}:{m}:{v} {layout}", equal(mine, theirs)


def main() -> int:
    """Exit status 1 when any result differs from the reference, 3 without the device."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    device = parser.parse_args().device
    if device == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA device: use --device cpu", file=sys.stderr)
        return 3
    results = [
        result
        for dtype in DTYPES
        for cases in (step_cases, nm_cases)
        for result in cases(device, dtype)
    ]
    wrong = [name for name, right in results if not right]
    for name in wrong:
        print(f"differs from the reference: {name}")
    print(f"{len(results) - len(wrong)} of {len(results)} cases equal, {backends.active(device)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

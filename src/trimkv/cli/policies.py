"""``trimkv policies``: who can decide."""

import click

from . import show
from .options import output_options

LAYER = {"Q": 9, "H": 3, "D": 64}  # whose state is counted: one of smollm2's 30


@click.command(short_help="List the policies that decide what is kept.")
@output_options
def policies(as_json: bool):
    """List the policies that decide which tokens are kept, and what each costs beside keys and values."""
    from ..cache.policies import POLICIES

    rows = [_row(name, policy) for name, policy in POLICIES.items()]
    if as_json:
        show.emit({"policies": rows})
        return
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console()
    for row in rows:
        needs = ", ".join(row["needs"]) or "positions"
        trained = ", trained" if row["trained"] else ""
        console.print(Text.assemble((row["name"], "bold"), f"  needs {needs}{trained}"))
        lines = [row["description"], f"Score: {row['score']}.", f"Evicts {row['evicts']}."]
        lines += [f"Attends to {row['peak_decode']}; within a prompt to {row['peak_prefill']}. State: {row['state']}."]
        lines += [f"Deviates: {row['deviations']}"] if row["deviations"] else []
        lines += [f"--profile paper: {row['published']}."] if row["published"] else []
        lines += [f"Source: {row['source']}"]
        console.print(Padding(Text("\n".join(lines), style="dim"), (0, 0, 1, 2)))


def _row(name: str, policy: type) -> dict:
    per_slot = sum(dtype.itemsize for dtype in policy.state.values())
    per_layer = policy().extra_bytes(0, **LAYER)
    state = f"{per_slot} B per slot" if per_slot else "none"
    if per_layer:
        state = f"{per_layer:,} B per layer (smollm2)" + (f", {state}" if per_slot else "")
    return {
        "name": name,
        "needs": sorted(policy.needs),
        "trained": policy.trained,
        "source": policy.source,
        "description": " ".join((policy.__doc__ or "").strip().split("\n\n")[0].split()),
        "score": policy.formula,
        "evicts": policy.evicts,
        "peak_decode": policy.peak_decode,
        "peak_prefill": policy.peak_prefill,
        "state": state,
        "state_bytes_per_slot": per_slot,
        "state_bytes_per_layer": per_layer,
        "deviations": policy.deviations,
        "published": _published(policy),
    }


def _published(policy: type) -> str:
    """What --profile paper changes, in words."""
    form = policy.published
    if form is None:
        return ""
    said = [f"as {form.name}"] if form.name else []
    said += [f"{option}={value}" for option, value in form.options.items()]
    said += ["a prompt attends in full and evicts after it"] if form.whole_prompt else []
    if form.buffer:
        said.append("attends before it evicts" if form.buffer == 1 else f"evicts every {form.buffer} tokens")
    return ", ".join(said)

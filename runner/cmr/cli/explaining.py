"""`--explain`: the plan of a session, what memory it takes, and how fast it will be."""

from __future__ import annotations

from typing import Any

from cmr.cli.progress import CompileNotice, Progress
from cmr.forecast import foretell
from cmr.plan import explain
from cmr.session import Session


def explain_plan(session: Session, wanted: dict[str, Any]) -> int:
    """Print the plan, then the speed that a few tokens with these request options foretell; exit status 0."""
    print("\n".join(explain(session.plan)), flush=True)
    with Progress("timing a few tokens") as progress:
        session.model.ops.compiling = CompileNotice(progress)
        speed = foretell(session, **wanted)
    print(f"{'speed':14} {speed}")
    return 0

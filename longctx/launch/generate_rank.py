"""One rank of `longctx generate --ring N`: ``python -m longctx.launch.generate_rank request.json``."""

from __future__ import annotations

import faulthandler
import sys
from pathlib import Path

from longctx.generation.request import FIGURES
from longctx.launch import rank as ranks
from longctx.launch import report
from longctx.world import launched_world


def main(path: Path) -> int:
    """Continue the prompt with the others; rank 0 writes the text to the terminal and its figures beside ``path``."""
    ranks._die_with_parent()
    faulthandler.enable()
    rank = launched_world()[1]
    try:
        from longctx.generation.request import Request
        from longctx.generation.run import Generator
        from longctx.mesh import Mesh

        ranks._meet(rank)
        request, console = Request.read(path), ranks._console(rank)
        mesh = Mesh(ring=ranks._world())
        mesh.connect()

        def write(text: str) -> None:
            if console is not None:
                console.write(text)
                console.flush()

        done = Generator(Path(request.folder), mesh).answer(request, write)
        write("\n")
        if console is not None:
            path.with_name(FIGURES).write_text(done.summary(mesh.sequence_size), encoding="utf-8")
        return 0
    except BaseException as error:
        if not report.leave(rank, error):
            ranks._print_once(rank, error)
        return 1


if __name__ == "__main__":
    ranks.end(main(Path(sys.argv[1])))

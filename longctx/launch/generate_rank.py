"""One rank of `longctx generate --ring N`: ``python -m longctx.launch.generate_rank request.json``."""

from __future__ import annotations

import faulthandler
import sys
from pathlib import Path

from longctx.generation.request import FIGURES
from longctx.launch import report
from longctx.launch.rank_process import console, die_with_parent, end, join, print_error, world_size
from longctx.world import launched_world


def main(path: Path) -> int:
    """Generate with the other ranks; rank 0 writes the text to the terminal and the statistics beside ``path``."""
    die_with_parent()
    faulthandler.enable()
    rank = launched_world()[1]
    try:
        from longctx.generation.generator import Generator
        from longctx.generation.request import Request
        from longctx.mesh import Mesh

        join(rank)
        request, stream = Request.read(path), console(rank)
        mesh = Mesh(ring=world_size())
        mesh.connect()

        def write(text: str) -> None:
            if stream is not None:
                stream.write(text)
                stream.flush()

        done = Generator(Path(request.folder), mesh).answer(request, write)
        write("\n")
        if stream is not None:
            path.with_name(FIGURES).write_text(done.summary(mesh.sequence_size), encoding="utf-8")
        return 0
    except BaseException as error:
        if not report.leave(rank, error):
            print_error(rank, error)
        return 1


if __name__ == "__main__":
    end(main(Path(sys.argv[1])))

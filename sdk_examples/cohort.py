"""A whole cohort on one machine: ``python cohort.py MODEL SITES HOME``.

MODEL is the directory of a transformers model, SITES holds one folder of images per client and
HOME is a new directory for everything that is kept. The server is a process of its own, as at
headquarters; the clients share this one.
"""

import subprocess
import sys
from pathlib import Path

from fedra_edge import EdgeClient, FedraEdgeError, join

RUN, ROUNDS = "trial", 3


def command(home: Path, *arguments: str) -> list[str]:
    """Spell a fedra-server command that works on this home."""
    return [sys.executable, "-m", "fedra_server", *arguments, "--home", str(home)]


def join_string(home: Path, uses: int) -> str:
    """Ask for what sites join with; at headquarters an operator does that."""
    create = command(home, "token", "create", "--uses", str(uses))
    done = subprocess.run(create, check=True, stdout=subprocess.PIPE, encoding="utf-8")
    return done.stdout.strip()


def prepare(home: Path, model: Path, participants: int) -> None:
    """Make a server home with one model and one run that is started."""
    size = ("--rounds", str(ROUNDS), "--min-participants", str(participants), "--batch-size", "16")
    for arguments in (
        ("init",),
        ("model", "add", "model", str(model)),
        ("run", "create", RUN, "--model", "model", "--start", *size),
    ):
        subprocess.run(command(home, *arguments), check=True)


def main(model: str, sites: str, place: str) -> None:
    """Tune at all sites and print what it brought."""
    home = Path(place) / "server"
    folders = sorted(it for it in Path(sites).iterdir() if it.is_dir())
    prepare(home, Path(model), len(folders))
    clients: list[EdgeClient] = []
    serve = command(home, "serve", "--port", "0")
    with subprocess.Popen(serve, stdout=subprocess.PIPE, encoding="utf-8") as server:
        try:
            if server.stdout:
                server.stdout.readline()  # "fedra-server listening on ADDRESS"
            joining = join_string(home, len(folders))
            for data in folders:
                own = Path(place) / "clients" / data.name
                clients.append(
                    join(joining, data=data, name=data.name, run=RUN, home=own, threads=1)
                )
            for client in clients:
                client.wait()
        finally:
            for client in clients:
                client.stop()
            server.terminate()
    subprocess.run(command(home, "run", "status", RUN), check=True)


if __name__ == "__main__":
    try:
        _, model, sites, place = sys.argv
    except ValueError:
        sys.exit(__doc__)
    try:
        main(model, sites, place)
    except (FedraEdgeError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")

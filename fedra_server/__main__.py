"""``python -m fedra_server`` is ``fedra-server``."""

from fedra_server.cli import main

main()

"""python -m pyreg ... is the command `pyreg ...`."""

from .cli import main

raise SystemExit(main())

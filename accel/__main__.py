"""`python -m accel`, where the `accel` command is not on the path."""

import sys

from accel.cli.main import main

sys.exit(main())

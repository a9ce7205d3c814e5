"""What finished samples say: tables, tests and figures of numbers, before any of it is drawn."""

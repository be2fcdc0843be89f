"""What a command ends with: 0 where it ran and nothing that ``--fail-on`` names was found, else one of these."""

FOUND = 1  # ``--fail-on`` found something
FAILED = 2  # it could not run, or nothing finite could be measured
INTERRUPTED = 130  # as a shell says of a process that Ctrl-C ended
PIPE_CLOSED = 141  # whoever read its output has left

"""The verbs of the command line. They read words and call the package; nothing is computed here."""

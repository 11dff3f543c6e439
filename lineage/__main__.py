"""`python -m lineage` is the command `lineage`."""

from lineage.commands import run

if __name__ == "__main__":
    run()

"""Check in a separate process, which can be killed, whether a JSON schema can be compiled.

Run as a script, it reads a schema from stdin and writes what is wrong with it to stdout, or nothing if it is valid. It
imports only llguidance, so that it starts quickly. Some schemas of a few lines (such as an ``allOf`` of patterns) take
minutes and gigabytes to compile, and a thread that compiles one can't be stopped.
"""

from __future__ import annotations

import resource
import sys


CPU_SECONDS, BYTES = 3, 2 << 30


def main() -> None:
    """Compile the schema from stdin."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    from llguidance import LLMatcher

    try:
        grammar = LLMatcher.grammar_from_json_schema(sys.stdin.read(), overrides={"lenient": False})
        print(LLMatcher.validate_grammar(grammar))
    except ValueError as error:
        print(error)


if __name__ == "__main__":
    main()

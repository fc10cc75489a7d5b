"""Whether a JSON schema can be compiled, found out by a process of its own, which may be killed.

Run as a script: a schema on stdin, what is wrong with it on stdout, and nothing where it is right. It imports
llguidance alone, so that it starts in a moment. Some schemas of a few lines take minutes and gigabytes to compile (an
``allOf`` of patterns, for one), and no thread that compiles one can be stopped.
"""

from __future__ import annotations

import resource
import sys


CPU_SECONDS, BYTES = 3, 2 << 30


def main() -> None:
    """Compile what stdin has."""
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

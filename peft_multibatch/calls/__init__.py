"""A call with ids: its plan and adapters, how long it is active, and the state that compiled code reads."""

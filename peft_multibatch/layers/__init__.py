"""How each PEFT layer class runs a mixed batch."""

"""What is in effect for one call: its plan, its adapters, and what compiled code sees of them."""

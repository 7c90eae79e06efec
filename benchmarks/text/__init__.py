"""Generated clips against their prompts."""

"""SDCL: two students, one EMA teacher, and losses that act where the students disagree."""

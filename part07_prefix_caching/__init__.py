"""Part 07: prefix caching. Blocks that hold the same beginning serve every sequence that has it."""

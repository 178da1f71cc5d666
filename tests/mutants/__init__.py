"""How much of what is wrong the tests find: sources changed in one place at a time, and the folder's own tests run on them."""

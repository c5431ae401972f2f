"""Tools that write generated files, build wheels, and test the tests; none of them is part of the package."""

"""The option --golden, of pytest's own or of tests/conftest.py."""


def pytest_addoption(parser):
    parser.addoption("--golden", help="folder of recorded cases (tests/golden)")

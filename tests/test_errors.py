"""What a command says instead of a traceback."""

from llamavid_jax.errors import command


def test_a_package_that_is_not_installed(capsys):
    @command("train.py")
    def main(arguments):
        import grains  # noqa: F401

    assert main([]) == 2
    assert capsys.readouterr().err == 'train.py: grains is not installed; pip install "llamavid_jax[train]"\n'

"""The command `kl-vae COMMAND`: one module per command, each with HELP, add_arguments and run."""

"""The command `kl-vae COMMAND`: one file a command, each with HELP, add_arguments and run."""

"""The subcommands of ``flax-googlenet``: arguments, words, progress and exit statuses."""

"""What `megatron-sppo COMMAND` and the scripts in tools/ and examples/ run."""

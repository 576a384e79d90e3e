"""What a user starts from: the training story, configs, prompts, Slurm scripts. Installed as megatron_sppo.examples."""

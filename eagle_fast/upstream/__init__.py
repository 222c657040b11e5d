"""What scripts for SafeAILab/EAGLE expect around them, for `eagle_fast.compat`: modules, older classes, a runner.

names     what is in which module
finder    `eagle.model`, and `model` where it is EAGLE's, at import
children  the same in processes that multiprocessing spawns
loops     the functions that baseline loops call, and those that only EAGLE's own rounds could use
variants  classes with the signatures and results of EAGLE's branches and of forks
runner    `python -m eagle_fast.compat`
"""

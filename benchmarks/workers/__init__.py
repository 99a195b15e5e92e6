"""The engines that are measured, each a process of its own in a Python that has it.

`serve.py MODULE ARGUMENT...` runs one: it imports the sibling MODULE, makes its `Engine`, and answers jobs. All times
are taken there, the same way for all. Nothing here but `seed_story_*` imports anything of this project.
"""

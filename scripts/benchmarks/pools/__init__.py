"""Process pools side by side: ours, the standard library's and others', each in a process of its own.

command --> comparison --a new interpreter for each measurement--> child --> contenders, cases
   |             |                                                  |
   |             +---- samples <------------- one line of JSON -----+
   +--> report (tables), plot
"""

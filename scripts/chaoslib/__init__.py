"""Faults by a seeded schedule against real processes, and the check of what came of it.

    runner ------- commands ------> kept, plain, users, hooks, rough       all write lines to the history
      | kills, stops, restarts        |  requests   ^  answers
      v                               v             |
    supervisor and its workers <------+-------------+
                                                        history -> checker -> report

`work`, `history`, `checker` and `schedule` are pure; the others do the I/O.
"""

"""A leaderboard as a person looks at it: tables in Markdown, and a page with plots."""

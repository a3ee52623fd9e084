"""What our import changes in RecBole 1.2.1: `apply` has the table. RecBole's files are never edited."""

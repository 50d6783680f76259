-- There is no percent sign in this file: printed as SQL (outbox migrate --sql) it would come out doubled.
select;

-- A stub.
select 1;

-- A role for each process, beside the one that owns the database and migrates. Safe to repeat: it then sets the passwords.
-- Run it as a superuser, or as a role with CREATEROLE, in the database of vdiff:
--
--   PGOPTIONS="-c vdiff.api_password=A -c vdiff.worker_password=B -c vdiff.deliver_password=C" psql -f roles.sql "$URL"
--
-- Then run `vdiff migrate`, as the owner: it grants each role what its process needs (migrations/grants.py), again with
-- each new version. The timeouts are those that the processes ask for themselves, which PgBouncer does not pass on.
DO $$
DECLARE
    part text;
    name text;
BEGIN
    FOREACH part IN ARRAY ARRAY['api', 'worker', 'deliver'] LOOP
        name := 'vdiff_' || part;
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) THEN
            EXECUTE format('CREATE ROLE %I', name);
        END IF;
        EXECUTE format('ALTER ROLE %I LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE PASSWORD %L',
                       name, current_setting('vdiff.' || part || '_password'));
        EXECUTE format('ALTER ROLE %I SET statement_timeout = ''30s''', name);
        EXECUTE format('ALTER ROLE %I SET idle_in_transaction_session_timeout = ''60s''', name);
        EXECUTE format('GRANT CONNECT ON DATABASE %I TO %I', current_database(), name);
    END LOOP;
END $$;
